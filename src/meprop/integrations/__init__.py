"""Callbacks for trainers; each module needs the extra of its name."""
