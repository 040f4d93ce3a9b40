"""Object storage: paths that are URLs, and the servers behind them."""

from pathopipe.remote.paths import Found, RemotePath, Version, check_rights, location
from pathopipe.remote.servers import explained

__all__ = ["Found", "RemotePath", "Version", "check_rights", "explained", "location"]
