"""The typed client of guestpull.v1, the command line `guestpull`, and the kata-agent stand-in."""
