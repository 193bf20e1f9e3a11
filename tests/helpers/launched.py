"""A command that starts its own ranks and does next to nothing: `python -m tests.helpers.launched HOW`."""

import os
import signal
import sys
import time

from alignment.errors import UserError
from alignment.ranks import launch as launch_module
from alignment.ranks import lifeline
from alignment.ranks.launch import launch
from alignment.ranks.place import take_place
from alignment.ranks.team import Post, join

OBEYED = 1
"""Seconds after which rank 0 obeys although another hangs, so that a test need not wait for longer."""


def say(post: Post, how: str) -> str:
    """What the rank that follows does."""
    print(f"rank {post.team.place.rank} is here", flush=True)
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "hangs":
        os.kill(os.getpid(), signal.SIGSTOP)
    if how == "refused":
        raise UserError("There is too little of it: get more.")
    return "well"


def main() -> None:
    how = sys.argv[1]
    if how == "hangs":
        lifeline._OWN_STOP_SECONDS, launch_module._SHUTDOWN_SECONDS = OBEYED, OBEYED + 2
    place = take_place()
    if place is None:
        launch(2, "tests.helpers.launched", sys.argv[1:])
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    team = join(place)
    if place.rank:
        team.follow()
        return
    try:
        print("asking", flush=True)
        print(*team.tell(say, how), flush=True)
        if how == "waits":
            time.sleep(60)
    except UserError as error:
        from alignment.run import _last_word

        sys.exit(_last_word(error))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; continue with: this")
    finally:
        team.end()


if __name__ == "__main__":
    main()
