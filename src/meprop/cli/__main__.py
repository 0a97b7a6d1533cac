"""`python -m meprop.cli` is `meprop`."""

import sys

from meprop.cli import main

sys.exit(main())
