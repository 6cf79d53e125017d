"""Asks a mirror for updates and believes nothing it says: The Update Framework (TUF), root pinned in the bundle.

The mirror (a relay, any static web server) can withhold an update, and no more: what it serves counts only with the
signatures of the project's keys, in date, not older than what was seen before, of the stated length and hash.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.client import HTTPResponse
from pathlib import Path

from tuf.api.exceptions import (
    BadVersionNumberError,
    DownloadError,
    DownloadHTTPError,
    ExpiredMetadataError,
    LengthOrHashMismatchError,
    RepositoryError,
    SlowRetrievalError,
    UnsignedMetadataError,
)
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from agent.update.offer import Offer, UpdateRefused, index_name, parse_offer_untrusted
from protocol.errors import RetryLater

TIMEOUT = 30.0
# A file that comes slower than this after the first seconds is given up.
LEAST_RATE = 4096.0
GRACE = 60.0
CHUNK = 64 * 1024
MAX_OFFER = 64 * 1024
MAX_BUNDLE = 1024 * 1024 * 1024


class HttpFetcher(FetcherInterface):
    """Plain HTTPS (or HTTP: everything is signed) with a time limit and a lowest rate."""

    def __init__(self, ca_file: Path | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._context = ssl.create_default_context(cafile=None if ca_file is None else str(ca_file))
        self._clock = clock

    def _fetch(self, url: str) -> Iterator[bytes]:
        if not url.startswith(("https://", "http://")):
            raise DownloadError(f"{url} is no address of a web server")
        request = urllib.request.Request(url, headers={"User-Agent": "towpath"})  # noqa: S310 - checked above
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT, context=self._context)  # noqa: S310 - as above
        except urllib.error.HTTPError as error:
            error.close()
            raise DownloadHTTPError(str(error), error.code) from error
        return self._chunks(response)

    def _chunks(self, response: HTTPResponse) -> Iterator[bytes]:
        began, received = self._clock(), 0
        with response as stream:
            while chunk := stream.read1(CHUNK):
                received += len(chunk)
                elapsed = self._clock() - began
                if elapsed > GRACE and received < LEAST_RATE * elapsed:
                    raise SlowRetrievalError("The mirror sends too slowly.")
                yield chunk


class Mirror:
    """One mirror and what was believed of it so far, kept in ``directory``. Everything blocks."""

    def __init__(self, directory: Path, root: bytes, url: str, fetcher: FetcherInterface) -> None:
        self._directory = directory
        self._root = root
        self._url = url.rstrip("/")
        self._fetcher = fetcher
        self._updater: Updater | None = None

    def _refreshed(self) -> Updater:
        if self._updater is None:
            for name in ("metadata", "targets"):
                (self._directory / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            updater = Updater(
                metadata_dir=str(self._directory / "metadata"),
                metadata_base_url=f"{self._url}/metadata/",
                target_dir=str(self._directory / "targets"),
                target_base_url=f"{self._url}/targets/",
                fetcher=self._fetcher,
                config=UpdaterConfig(max_root_rotations=64, targets_max_length=1_000_000, snapshot_max_length=500_000),
                bootstrap=self._root,
            )
            updater.refresh()
            self._updater = updater
        return self._updater

    def offer(self, channel: str, of_platform: str) -> Offer | None:
        """The release of a channel for a platform; None if there is none.

        Raises `UpdateRefused` for what must not be believed, `RetryLater` when the mirror cannot be asked.
        """
        with _explained():
            updater = self._refreshed()
            info = updater.get_targetinfo(index_name(channel, of_platform))
            if info is None:
                return None
            if info.length > MAX_OFFER:
                raise UpdateRefused("The release's description is too long.")
            path = updater.download_target(info)
            offer = parse_offer_untrusted(Path(path).read_bytes())
        if (offer.platform, offer.channel) != (of_platform, channel):
            raise UpdateRefused(
                f"The release is for {offer.platform} in channel {offer.channel}, not for {of_platform} in {channel}.",
                code="WRONG_PLATFORM",
            )
        return offer

    def download(self, offer: Offer) -> Path:
        """The bundle of an offer, verified. Raises as `offer`."""
        with _explained():
            updater = self._refreshed()
            info = updater.get_targetinfo(offer.bundle)
            if info is None:
                raise UpdateRefused(f"The release names a bundle that is not signed: {offer.bundle}.")
            if info.length > MAX_BUNDLE:
                raise UpdateRefused("The bundle is too large.")
            if shutil.disk_usage(self._directory).free < 4 * info.length:
                raise RetryLater("There is too little room on the disk for an update.", code="NO_SPACE")
            return Path(updater.download_target(info))


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """TUF's errors as the project's."""
    try:
        yield
    except ExpiredMetadataError as error:
        raise UpdateRefused(
            "What the mirror serves has run out: it is old, or this machine's clock is wrong.", code="UPDATE_EXPIRED"
        ) from error
    except BadVersionNumberError as error:
        raise UpdateRefused("The mirror serves something older than before.", code="UPDATE_ROLLBACK") from error
    except UnsignedMetadataError as error:
        raise UpdateRefused("The project's signatures are missing.", code="UPDATE_UNSIGNED") from error
    except LengthOrHashMismatchError as error:
        raise UpdateRefused("What the mirror serves is not what was signed.", code="UPDATE_MISMATCH") from error
    except DownloadError as error:
        if "exceeding" in str(error):
            raise UpdateRefused("The mirror sends more than was signed.", code="UPDATE_MISMATCH") from error
        raise RetryLater(f"The mirror cannot be asked: {error}.") from error
    except RepositoryError as error:
        raise UpdateRefused(f"What the mirror serves cannot be believed: {error}.") from error
    except OSError as error:
        raise RetryLater(f"The update cannot be kept: {error.strerror or error}.") from error
