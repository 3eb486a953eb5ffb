"""What a run was like, in one file that is written line by line; reading it needs neither torch nor Lightning."""
