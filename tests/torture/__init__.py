"""A daemon that is never left in peace, and what must be true of it all the same.

    scripts/torture --minutes 10 --kills 200 --seed 7

      world.py       images whose unpacked layers and merged root filesystems are known beforehand
      promises.py    what callers were told: this bundle is ready, this image is there
      callers.py     random pulls, releases and removals, many at once, some of them given up; containers that use
                 a bundle while it is released, and bundles that are taken away without a call
      weather.py     what goes wrong meanwhile: the registry, the disk, the layer workers
      inspection.py  what must hold after every restart, looked at from outside
      campaign.py    the rounds: let callers loose, pull the plug, look, start again, look, clean up

All that is random comes of one seed, which is printed; what the machine does in the same time does not, so that
a seed brings back a campaign much like the one that failed, not the same. Start with `campaign.Campaign`.
"""
