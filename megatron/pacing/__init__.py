"""Schedules as pure functions of progress. Nothing here needs torch."""
