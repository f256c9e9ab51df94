"""What the kernels do on a real GPU, each beside a peer measured in the same run. `make bench` runs them all."""
