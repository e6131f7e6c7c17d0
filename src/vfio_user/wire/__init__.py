"""What the bytes are: constants, messages, the table of commands, the capabilities JSON. No I/O, no state."""
