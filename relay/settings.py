"""The relay's configuration: `conf/relay.yaml` as typed records.

Every key has its default here and its explanation in the file. A key that does not exist, a value of the wrong kind
or out of range is refused with the file, the line and what would be right; nothing is guessed and nothing ignored.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
import yaml
from msgspec import Meta

from protocol.errors import NeedsPerson
from relay.proxies import Header, Proxies, network_of

_EVERYWHERE = ("0.0.0.0", "::")  # noqa: S104 - compared, not bound
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
# What msgspec says of something in a list of records.
_ENTRY = re.compile(r"(?P<reason>(?:Object|Expected|Invalid) .*) - at `\$\[(?P<entry>\d+)\](?:\.(?P<key>\w+))?.*`")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\[\]:-]+")
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")


class SettingsError(NeedsPerson):
    """The configuration cannot be used; the sentence names file, line and key."""

    default_code = "CONFIGURATION"


class Duration(float):
    """Seconds; written in the file as a number and a unit: ``90s``, ``15m``, ``12h``, ``30d``."""


Text = Annotated[str, Meta(min_length=1, max_length=1000, description="a text that is not empty")]
Port = Annotated[int, Meta(ge=0, le=65535, description="a whole number from 0 to 65535 (0: any free port)")]
Switch = Annotated[bool, Meta(description="true or false")]
Life = Annotated[Duration, Meta(description="a length of time such as 90s, 15m, 12h or 30d")]


class _Section(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all sections."""


class Listen(_Section, frozen=True, kw_only=True):
    """Where the relay's one port is, and under which address the world knows it."""

    host: Text = "0.0.0.0"  # noqa: S104 - a relay is there to be reached; the file says how to narrow it
    port: Port = 8443
    url: Text | None = None
    proxies: Annotated[list[Text], Meta(max_length=100, description="a list of IP addresses and networks")] = []
    proxy_header: Header = "x-forwarded-for"

    @property
    def front(self) -> Proxies:
        """The reverse proxies in front of this relay."""
        return Proxies(self.proxies, self.proxy_header)


class Stun(_Section, frozen=True, kw_only=True):
    """STUN over UDP, which helps agents to learn what their NATs do; over TCP the one port serves it."""

    ports: Annotated[list[Port], Meta(max_length=4, description="a list of at most 4 port numbers")] | None = None


class Tls(_Section, frozen=True, kw_only=True):
    """The certificate. Without one of the operator's own, the relay makes a CA and a certificate itself."""

    certificate: Text | None = None
    key: Text | None = None
    names: Annotated[list[Text], Meta(max_length=100, description="a list of host names and IP addresses")] = []


class Database(_Section, frozen=True, kw_only=True):
    """Where the relay keeps what it must not forget."""

    file: Text = "relay.sqlite"
    readers: Annotated[int, Meta(ge=1, le=64, description="a whole number from 1 to 64")] = 4


class Provider(_Section, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An upstream OpenID provider. ``id`` names it in addresses; the secret is in a file beside the configuration.

    ``usernames`` are templates over the provider's claims, the first that gives a username of ``domains`` counts.
    """

    id: Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
    name: Text
    issuer: Text
    client_id: Text
    client_secret_file: Text | None = None
    scopes: Annotated[list[Text], Meta(max_length=20)] = msgspec.field(
        default_factory=lambda: ["openid", "profile", "email"]
    )
    usernames: Annotated[list[Text], Meta(min_length=1, max_length=10)] = msgspec.field(
        default_factory=lambda: ["{preferred_username}", "{email}"]
    )
    domains: Annotated[list[Text], Meta(min_length=1, max_length=1000)]
    allow: Annotated[list[Text], Meta(max_length=1000)] = []
    ca_file: Text | None = None
    private_addresses: bool = False


class SignIn(_Section, frozen=True, kw_only=True):
    """The domain of local users, lives of tokens, and how much guessing is tolerated."""

    domain: Text | None = None
    access_token_life: Life = Duration(48 * 3600)
    refresh_token_life: Life = Duration(180 * 86400)
    failures: Annotated[int, Meta(ge=1, le=10_000, description="a whole number from 1 to 10000")] = 10
    failures_window: Life = Duration(300)
    local_accounts: Switch = True
    providers: Annotated[list[Provider], Meta(max_length=50, description="a list of providers")] = []
    session_life: Life = Duration(30 * 86400)
    session_idle: Life = Duration(7 * 86400)
    code_life: Life = Duration(300)
    device_code_life: Life = Duration(900)
    service_token_life: Life = Duration(366 * 86400)
    unregistered_clients: Switch = True
    id_token_key_life: Life = Duration(90 * 86400)


class Tickets(_Section, frozen=True, kw_only=True):
    """Permissions for agents to deal with each other."""

    life: Life = Duration(12 * 3600)
    key_life: Life = Duration(30 * 86400)


class Tasks(_Section, frozen=True, kw_only=True):
    """Transfer and delete tasks."""

    deadline: Life = Duration(30 * 86400)
    retention: Life = Duration(90 * 86400)
    max_items: Annotated[int, Meta(ge=1, le=10_000_000, description="a whole number from 1 to 10000000")] = 100_000


class Enrolment(_Section, frozen=True, kw_only=True):
    """Setting up agents."""

    setup_key_life: Life = Duration(7 * 86400)


class Limits(_Section, frozen=True, kw_only=True):
    """Bounds on what one client may ask of the relay."""

    request_body: Annotated[int, Meta(ge=1024, le=1 << 30, description="a number of bytes from 1024 to 1073741824")] = (
        64 << 20
    )
    connections: Annotated[int, Meta(ge=1, le=1_000_000, description="a whole number from 1 to 1000000")] = 20_000
    call_timeout: Life = Duration(30)
    user_requests: Annotated[int, Meta(ge=0, le=10_000_000, description="a whole number, 0 for no limit")] = 6000
    user_requests_period: Life = Duration(60)
    user_tasks: Annotated[int, Meta(ge=0, le=10_000_000, description="a whole number, 0 for no limit")] = 10_000


Amount = Annotated[int, Meta(ge=0, le=1 << 60, description="a number of bytes, 0 for no limit")]
Rate = Annotated[int, Meta(ge=0, le=1 << 50, description="a number of bytes a second, 0 for no limit")]


class Tunnel(_Section, frozen=True, kw_only=True):
    """Carrying data between agents that cannot reach each other."""

    processes: Annotated[int, Meta(ge=0, le=64, description="a whole number from 0 to 64")] = 1
    connections: Annotated[int, Meta(ge=1, le=100_000, description="a whole number from 1 to 100000")] = 2000
    session_bytes: Amount = 0
    user_bytes: Amount = 0
    session_rate: Rate = 0
    user_rate: Rate = 0
    total_rate: Rate = 0


class Web(_Section, frozen=True, kw_only=True):
    """Web pages and programs in browsers."""

    allowed_origins: Annotated[list[Text], Meta(max_length=100, description="a list of web origins")] = msgspec.field(
        default_factory=lambda: ["*"]
    )


class Log(_Section, frozen=True, kw_only=True):
    """What the relay writes to its standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["text", "json"] = "text"


class Settings(_Section, frozen=True, kw_only=True):
    """All of `relay.yaml`. ``directory`` is where keys, certificates and the database are."""

    name: Text = "Towpath relay"
    directory: Text = "."
    updates: Text | None = None
    listen: Listen = Listen()
    stun: Stun = Stun()
    tls: Tls = Tls()
    database: Database = Database()
    sign_in: SignIn = SignIn()
    tickets: Tickets = Tickets()
    tasks: Tasks = Tasks()
    enrolment: Enrolment = Enrolment()
    limits: Limits = Limits()
    tunnel: Tunnel = Tunnel()
    web: Web = Web()
    log: Log = Log()

    @property
    def public_url(self) -> str:
        """The relay's origin as users and agents write it, without a slash at the end."""
        if self.listen.url is not None:
            return self.listen.url.rstrip("/")
        host = "localhost" if self.listen.host in _EVERYWHERE else self.listen.host
        return f"https://[{host}]:{self.listen.port}" if ":" in host else f"https://{host}:{self.listen.port}"

    @property
    def stun_ports(self) -> tuple[int, ...]:
        """UDP ports for STUN: those configured, else the number of the one port and the one after it."""
        if self.stun.ports is not None:
            return tuple(self.stun.ports)
        port = self.listen.port
        return (0, 0) if port == 0 else (port, port + 1 if port < 65535 else port - 1)

    @property
    def directory_path(self) -> Path:
        return Path(self.directory)

    @property
    def updates_path(self) -> Path | None:
        """The project's releases that this relay passes on, if it does."""
        return None if self.updates is None else self.directory_path / self.updates

    @property
    def database_url(self) -> str:
        """The SQLAlchemy URL of the database."""
        return f"sqlite:///{self.directory_path / self.database.file}"

    @property
    def user_domain(self) -> str:
        """What stands behind the @ of local users' names."""
        host = urlsplit(self.public_url).hostname or "localhost"
        return (self.sign_in.domain or ("localhost" if ":" in host else host)).lower()

    @property
    def certificate_names(self) -> list[str]:
        """What a self-made certificate is good for: the configured names, the public URL's host, this machine."""
        names = [*self.tls.names, urlsplit(self.public_url).hostname or "localhost"]
        if self.listen.host not in _EVERYWHERE:
            names.append(self.listen.host)
        names += ["localhost", "127.0.0.1", "::1"]
        return list(dict.fromkeys(_normal_name(name) for name in names))


def load(path: Path) -> Settings:
    """Read and check a configuration file. A relative ``directory`` counts from the file's own place.

    Raises `SettingsError` for anything wrong with it, a missing file included.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        where = (
            " Say where it is with --config or TOWPATH_RELAY_CONFIG, or make a relay: `towpath-relay init`."
            if missing
            else ""
        )
        raise SettingsError(f"{path}: cannot be read: {error.strerror}.{where}", who="relay operator") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: is not UTF-8 text (byte {error.start}).", who="relay operator") from error
    settings = parse(text, str(path))
    directory = (path.resolve().parent / Path(settings.directory).expanduser()).resolve()
    return msgspec.structs.replace(settings, directory=str(directory))


def parse(text: str, where: str = "relay.yaml") -> Settings:
    """Settings from YAML text. ``where`` names it in errors. Raises `SettingsError`."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{where}{line}: this is not YAML: {error.problem}.", who="relay operator") from error
    except (yaml.YAMLError, RecursionError) as error:
        reason = str(error).partition("\n")[0]
        raise SettingsError(f"{where}: this is not YAML: {reason}.", who="relay operator") from error
    if node is None:
        return Settings()
    settings: Settings = _Reader(where).section(node, Settings, "")
    _check_together(settings, where)
    return settings


class _Reader:
    """Walks the YAML tree beside the records, so that every complaint knows its line."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._values = yaml.SafeLoader("")

    def section(self, node: yaml.Node, kind: type[Any], prefix: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:null":
            return kind()
        if not isinstance(node, yaml.MappingNode):
            raise self._error(node, f"{prefix.rstrip('.') or 'the file'} must be a section of `key: value` lines.")
        fields = {field.name: field for field in msgspec.structs.fields(kind)}
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key not in fields:
                known = ", ".join(sorted(fields))
                raise self._error(key_node, f"there is no key {prefix}{key}; here the keys are {known}.")
            if key in values:
                raise self._error(key_node, f"{prefix}{key} stands here for the second time.")
            values[key] = self._value(value_node, fields[key].type, prefix + key)
        return kind(**values)

    def _value(self, node: yaml.Node, kind: Any, name: str) -> Any:
        if isinstance(kind, type) and issubclass(kind, _Section):
            return self.section(node, kind, name + ".")
        try:
            raw = self._values.construct_document(node)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = error.problem if isinstance(error, yaml.MarkedYAMLError) else error
            raise self._error(node, f"{name} cannot be read: {reason}.") from error
        try:
            return msgspec.convert(raw, kind, dec_hook=_decode_duration)
        except msgspec.ValidationError as error:
            place = _ENTRY.fullmatch(str(error))
            entry = node.value[int(place["entry"])] if place and isinstance(node, yaml.SequenceNode) else None
            if place is not None and isinstance(entry, yaml.MappingNode):
                raise self._error(entry, f"{name}, entry {int(place['entry']) + 1}: {_said(place)}.") from error
            raise self._error(node, f"{name} must be {_description(kind)}, not {raw!r:.80}.") from error

    def _error(self, node: yaml.Node, sentence: str) -> SettingsError:
        line = node.start_mark.line + 1 if node.start_mark else 0
        return SettingsError(f"{self._where}, line {line}: {sentence}", who="relay operator")


def _said(place: re.Match[str]) -> str:
    """What msgspec says of an entry of a list, in words of ours; as it is where there are none."""
    key = f"{place['key']}: " if place["key"] else ""
    reason = place["reason"].removeprefix("Object ").replace("contains unknown field", "there is no key")
    return key + reason.replace("missing required field", "it needs the key")


def _decode_duration(kind: type[Any], value: object) -> Any:
    """msgspec asks here for what it does not know itself. It takes TypeError and ValueError for mistakes in the
    operator's file; a setting of some other kind would be a mistake of ours."""
    assert kind is Duration, f"no way to read a setting of the kind {kind.__name__}"
    return Duration(seconds_of(value))


def seconds_of(value: object) -> float:
    """Seconds of a length of time such as ``90s``, ``15m``, ``12h`` or ``30d``. Raises ValueError."""
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if match is None or float(match[1]) <= 0:
        raise ValueError("not a duration")
    return float(match[1]) * _SECONDS[match[2]]


def _description(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        for note in get_args(kind)[1:]:
            if isinstance(note, Meta) and note.description:
                return note.description
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    options = [_description(option) for option in get_args(kind) if option is not type(None)]
    return " or ".join(options) if options else str(kind)


def _check_together(settings: Settings, where: str) -> None:
    def refuse(sentence: str) -> SettingsError:
        return SettingsError(f"{where}: {sentence}", who="relay operator")

    if (settings.tls.certificate is None) != (settings.tls.key is None):
        raise refuse("tls.certificate and tls.key belong together; give both or neither.")
    if settings.tickets.key_life < 3 * settings.tickets.life:
        raise refuse("tickets.key_life must be at least three times tickets.life.")
    if settings.sign_in.domain is not None and not _HOST.fullmatch(settings.sign_in.domain):
        raise refuse(f"sign_in.domain: {settings.sign_in.domain!r} is no domain name.")
    for name in settings.tls.names:
        _check_host(name, refuse)
    for address in settings.listen.proxies:
        try:
            network_of(address)
        except ValueError:
            raise refuse(f"listen.proxies: {address!r} is no IP address, nor a network such as 10.0.0.0/8.") from None
    _check_providers(settings.sign_in.providers, refuse)
    for origin in settings.web.allowed_origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise refuse(f"web.allowed_origins: {origin!r} is no origin such as https://portal.example.org, nor *.")
    if settings.listen.url is not None:
        try:
            url = urlsplit(settings.listen.url)
            valid = url.scheme == "https" and url.hostname and (url.port is None or url.port > 0)
        except ValueError:
            valid = False
        if not valid or url.path.strip("/") or url.query or url.fragment or url.username:
            raise refuse("listen.url must be an origin such as https://relay.example.org:8443, without a path.")


def _check_providers(providers: list[Provider], refuse: Any) -> None:
    if len({provider.id for provider in providers}) < len(providers):
        raise refuse("sign_in.providers: two providers have the same id.")
    if len({provider.issuer for provider in providers}) < len(providers):
        raise refuse("sign_in.providers: two providers have the same issuer.")
    for provider in providers:
        parts = urlsplit(provider.issuer)
        if parts.scheme != "https" or not parts.hostname or parts.query or parts.fragment:
            raise refuse(f"sign_in.providers: the issuer of {provider.id} must be an https address.")


def _check_host(name: str, refuse: Any) -> None:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        if not _HOST.fullmatch(name.removeprefix("*.")):
            raise refuse(f"tls.names: {name!r} is neither a host name nor an IP address.") from None


def _normal_name(name: str) -> str:
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower()


def as_document(settings: Settings) -> Mapping[str, Any]:
    """The settings in force, for `config check`."""
    document: dict[str, Any] = msgspec.to_builtins(settings, enc_hook=lambda value: float(value))
    return document
