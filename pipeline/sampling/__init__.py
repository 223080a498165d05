"""Which sample comes when, and how it is augmented: functions of (seed, epoch, id)."""
