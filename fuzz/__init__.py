"""Fuzzers; see README.md."""
