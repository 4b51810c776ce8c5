"""The exception for mistakes of the user."""


class UserError(Exception):
    """A mistake that the user can mend: the command prints the message as one sentence and exits with code 2.

    The message says what was given, why it cannot work and the nearest legal choice.
    """
