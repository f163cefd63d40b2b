"""The two-armed ALOHA of `gym_aloha`: hands a cube over, or puts a peg into a socket. 50 Hz; needs the extra `sim`."""
