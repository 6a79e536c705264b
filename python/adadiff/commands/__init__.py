"""What the commands do: print the resolved configuration, make one call, print or write what came of it."""
