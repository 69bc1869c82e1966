"""PEFT's own tests, run through our readers and writers. `make matrix`; it is no part of `make test`."""
