"""Checksums that users name: the published values of every algorithm, at their full width."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agent.storage.posix import PosixRoot, open_root
from agent.transfer.basis.checksum import ALGORITHMS, file_digest, normalised_algorithm
from protocol.control import TaskItem
from protocol.errors import ItemFailed
from tests.agent.engine_inside import CHECKED, Engine, quick_path

__all__ = ["quick_path"]


def xxhash_test_data(length: int) -> bytes:
    """The buffer that the test vectors of xxHash are about (its reference implementation, ``sanity_test``)."""
    state, data = 2654435761, bytearray()
    for _ in range(length):
        data.append(state >> 56)
        state = state * 11400714785074694797 % 2**64
    return bytes(data)


def blake3_test_data(length: int) -> bytes:
    """The input of the official test vectors of BLAKE3."""
    return bytes(number % 251 for number in range(length))


TWO_BLOCKS = b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"
TWO_LONG_BLOCKS = (
    b"abcdefghbcdefghicdefghijdefghijkefghijklfghijklmghijklmnhijklmnoijklmnopjklmnopqklmnopqrlmnopqrsmnopqrstnopqrstu"
)
# RFC 1321 A.5, FIPS 180-2 (and NIST's example values), the sanity test of xxHash, test_vectors.json of BLAKE3; of MD5
# one more that is known for its zeros. Some begin with zeros: a width that is not fixed would show.
PUBLISHED = [
    ("MD5", b"", "d41d8cd98f00b204e9800998ecf8427e"),
    ("MD5", b"abc", "900150983cd24fb0d6963f7d28e17f72"),
    ("MD5", b"message digest", "f96b697d7cb7938d525a2f31aaf161d0"),
    ("MD5", b"1234567890" * 8, "57edf4a22be3c955ac49da2e2107b67a"),
    ("MD5", b"jk8ssl", "0000000018e6137ac2caab16074784a6"),
    ("SHA1", b"", "da39a3ee5e6b4b0d3255bfef95601890afd80709"),
    ("SHA1", b"abc", "a9993e364706816aba3e25717850c26c9cd0d89d"),
    ("SHA-1", TWO_BLOCKS, "84983e441c3bd26ebaae4aa1f95129e5e54670f1"),
    ("SHA1", b"a" * 1_000_000, "34aa973cd4c4daa4f61eeb2bdbad27316534016f"),
    ("SHA-256", b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
    ("SHA-256", b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
    ("sha256", TWO_BLOCKS, "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"),
    ("SHA-256", b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    (
        "SHA-512",
        b"abc",
        "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a"
        "2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
    ),
    (
        "SHA512",
        TWO_LONG_BLOCKS,
        "8e959b75dae313da8cf4f72814fc143f8f7779c6eb9f7fa17299aeadb6889018"
        "501d289e4900f7e4331b99dec4b5433ac7d329eeb6dd26545e96e55b874be909",
    ),
    ("XXH3-128", b"", "99aa06d3014798d86001c324468d497f"),
    ("XXH3-128", xxhash_test_data(1), "a6cd5e9392000f6ac44bdff4074eecdb"),
    ("XXH128", xxhash_test_data(6), "082afe0b8162d12a3e7039bdda43cfc6"),
    ("XXH3-128", xxhash_test_data(12), "6e3efd8fc7802b18061a192713f69ad9"),
    ("XXH3-128", xxhash_test_data(24), "0ce966e4678d37611e7044d28b1b901d"),
    ("XXH3-128", xxhash_test_data(48), "a002ac4e5478227ef942219aed80f67b"),
    ("XXH3-128", xxhash_test_data(81), "4952f58181ab00425e8bafb9f95fb803"),
    ("XXH3-128", xxhash_test_data(222), "337e09641b948717f1aebd597cec6b3a"),
    ("XXH3-128", xxhash_test_data(403), "1b6de21e332dd73dcdeb804d65c6dea4"),
    ("XXH3-128", xxhash_test_data(512), "18d2d110dcc9bca1617e49599013cb6b"),
    ("BLAKE3", b"", "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"),
    ("BLAKE3", blake3_test_data(1), "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213"),
    ("BLAKE3", blake3_test_data(1025), "d00278ae47eb27b34faecf67b4fe263f82d5412916c1ffd97c8cb7fb814b8444"),
]


@pytest.mark.parametrize(("algorithm", "content", "value"), PUBLISHED)
def test_digests_are_the_published_ones(tmp_path: Path, algorithm: str, content: bytes, value: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with open_root(str(tmp_path)) as root, root.open_directory(()) as folder:
        assert isinstance(root, PosixRoot)
        descriptor = folder.open_read(b"file")
        assert file_digest(root, descriptor, algorithm) == value
        root.close_file(descriptor)


def test_every_algorithm_has_published_values_and_one_spelling() -> None:
    assert {normalised_algorithm(algorithm) for algorithm, _, _ in PUBLISHED} == set(ALGORITHMS)
    for name in ("CRC32", "MD4", "SHA-3", "md55", "", "blake2b", "none"):
        with pytest.raises(ItemFailed) as raised:
            normalised_algorithm(name)
        assert raised.value.code == "BAD_ALGORITHM"


async def test_given_digests_decide_in_every_algorithm(quick_path: Path) -> None:
    engine = Engine(quick_path, msgspec.structs.replace(CHECKED, preserve_timestamp=False), items=[])
    wrong = 0
    for number, (algorithm, content, value) in enumerate(PUBLISHED):
        (engine.source / str(number)).write_bytes(content)
        for given, name in ((value, f"right-{number}"), ("0" * len(value), f"wrong-{number}")):
            engine.items.append(
                TaskItem(
                    source_path=f"/{number}",
                    destination_path=f"/{name}",
                    external_checksum=given,
                    checksum_algorithm=algorithm,
                )
            )
            wrong += name.startswith("wrong")
    observed = await engine.run()
    assert (observed.state, observed.counters.failed) == ("FAILED", wrong)
    names = {path.name for path in engine.destination.iterdir()}
    assert names == {f"right-{number}" for number in range(len(PUBLISHED))}
    print(f"published values: {len(PUBLISHED)}, wrong ones refused: {wrong}")
