"""The cases, a module for each chapter."""
