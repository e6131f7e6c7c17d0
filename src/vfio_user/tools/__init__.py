"""What the commands do, as a library."""
