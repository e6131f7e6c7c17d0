"""Plays the server for a client: watches what it sends, and how it takes what it is sent."""
