"""The commands. Each prints its resolved configuration, makes one call, and prints or writes the result."""
