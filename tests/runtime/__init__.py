"""Tests of the thin runtime."""
