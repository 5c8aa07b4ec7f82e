"""The conformance kit: `make conformance`, which is `python -m k8s.conformance`."""
