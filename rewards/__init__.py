"""Rewards beside the judge's score: certainty, comparisons, majority vote, a remote judge."""
