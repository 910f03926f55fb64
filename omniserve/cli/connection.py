"""How commands find a server that is running: `--url`, and an API key that need not stand on the command line."""

from omniserve.cli.flags import Common, server_layers
from omniserve.remote import DEFAULT_URL, Place


def place(url: str | None, key: str | None, common: Common) -> Place:
    """Return where a server is. The key is the flag's, else OMNISERVE_API_KEY's, else that of the config file.

    Of several keys, which a server's own settings may hold, the first one is taken. Raises ConfigError for a URL, a
    file or a key that is none.
    """
    keys = server_layers({} if key is None else {"api_key": key}, common)[0].api_key
    return Place.at(DEFAULT_URL if url is None else url, keys[0] if keys else None)
