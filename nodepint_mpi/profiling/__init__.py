"""Where a run's time goes: timers, sampled profiles, exact counts, and the record of them."""
