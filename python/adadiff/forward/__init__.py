"""One forward pass of a network whose lanes may exit early, on a CPU or a GPU."""
