"""Callbacks for trainers. Each module needs the extra of its name."""
