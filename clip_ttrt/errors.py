"""What a user can get wrong, as one exception type whose text is the sentence to show."""


class UserError(ValueError):
    """Bad input or a missing prerequisite.  The message names the value and the remedy."""


class VerificationError(RuntimeError):
    """The compiled encoders differ from the original model by more than the precision allows."""
