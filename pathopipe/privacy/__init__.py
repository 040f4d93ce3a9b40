"""Privacy: looks for what should not leave the house in all that pathopipe writes, and in what lies beside it."""

from pathopipe.privacy.patterns import KINDS
from pathopipe.privacy.search import Finding, Search, search

__all__ = ["KINDS", "Finding", "Search", "search"]
