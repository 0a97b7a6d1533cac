"""Callbacks for trainers, each of which needs the extra of its name, and what torch's quantization needs."""
