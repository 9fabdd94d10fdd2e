"""What the command line's commands do, one file each; heavy imports stay inside functions."""
