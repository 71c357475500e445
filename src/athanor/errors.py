"""Errors that a person can act on."""


class UserError(Exception):
    """Something that the person at the keyboard can mend; its text says how."""
