"""One evaluation of a network whose lanes may leave it early, on a CPU and on a device."""
