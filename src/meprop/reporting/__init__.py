"""Show results: tables and progress in the terminal, figures on disk."""
