"""What holds for every test, wherever the tests run."""

import signal

# Commands ignore the end of a terminal if they inherit that, as from tests under nohup.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
