"""What can go wrong through somebody's input: typed errors of one sentence, raised at the border."""


class OmniserveError(Exception):
    """A mistake that the user can mend; the command line prints its sentence and exits with 2."""


class ConfigError(OmniserveError):
    """An option, or a combination of options, that cannot be honoured."""


class CheckpointError(OmniserveError):
    """A model file that is missing, corrupt or of a kind that is not supported."""


class CapacityError(OmniserveError):
    """Something that cannot fit: a model in memory, a request in the pool."""


class RequestError(OmniserveError):
    """A request that cannot be served as given."""


class ServerError(OmniserveError):
    """A server that cannot be reached, or that refuses what it was asked."""


class DeviceMemoryError(OmniserveError):
    """A step needs more memory than the device has left; nothing of it counts."""
