"""Timings of tenzoo against a bare loop, against itself at other sizes, and against tltorch; see README.md here."""
