"""Exports: what other programs read, made from a store."""
