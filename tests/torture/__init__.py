"""Tortures a daemon, and checks what must be true all the same.

    scripts/torture --minutes 10 --kills 200 --seed 7

      world.py       images whose unpacked layers and merged root filesystems are known beforehand
      promises.py    what callers may rely on: bundles that are ready, images that were pulled
      callers.py     concurrent random pulls, releases and removals, some of them cancelled; containers that use a
                     bundle while it is released, and bundles that are deleted without a call
      weather.py     faults of the registry, the disk and the layer workers
      inspection.py  checks after every restart, from outside the daemon
      campaign.py    rounds: start callers, kill the daemon, check, restart, check, clean up

All random choices depend on one seed, which is printed. The timing of the machine does not, so a seed repeats a
campaign approximately. Start with `campaign.Campaign`.
"""
