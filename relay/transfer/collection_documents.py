"""The endpoint document of the Transfer API, every key always present.

Keys that belong to parts of Globus which have no counterpart here (activation, MyProxy, S3, GridFTP servers) keep the
values that clients take for "not in use".
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Collection as Container
from dataclasses import dataclass
from typing import Any

from relay.access.decisions import Ability, Subject, abilities, effective_roles
from relay.times import api_time
from relay.transfer.collections import Collection

ENTITY_TYPE = "GCP_mapped_collection"


@dataclass(frozen=True, kw_only=True)
class View:
    """What a document needs beside the collection: who looks, who owns it, and what is known this moment."""

    subject: Subject
    owner: str
    connected: bool
    paused: bool
    in_use: bool


def legacy_username(identity_id: str) -> str:
    """``u_`` and the lower-case base32 of the identity's UUID, as in the Globus documents."""
    return "u_" + base64.b32encode(uuid.UUID(identity_id).bytes).decode().rstrip("=").lower()


def endpoint_document(collection: Collection, view: View) -> dict[str, Any]:
    """A collection as ``GET /endpoint/<id>`` shows it."""
    return {
        "DATA_TYPE": "endpoint",
        "id": collection.id,
        "entity_type": ENTITY_TYPE,
        **_naming(collection, view.owner),
        **_description(collection),
        **_state(collection, view),
        **_policy(collection, view),
        **_hosting(collection),
        **_NOT_IN_USE,
        "DATA": [_server(collection, view)],
    }


def _naming(collection: Collection, owner: str) -> dict[str, Any]:
    username = legacy_username(collection.owner_id)
    return {
        "display_name": collection.display_name,
        "name": collection.id,
        "canonical_name": f"{username}#{collection.id}",
        "username": username,
        "owner_id": collection.owner_id,
        "owner_string": owner,
    }


def _description(collection: Collection) -> dict[str, Any]:
    return {
        "description": collection.description,
        "organization": collection.organization,
        "department": collection.department,
        "keywords": collection.keywords,
        "contact_email": collection.contact_email,
        "contact_info": collection.contact_info,
        "info_link": collection.info_link,
        "user_message": collection.user_message,
        "user_message_link": collection.user_message_link,
        "location": collection.location,
        "default_directory": collection.default_directory or collection.reported_directory,
    }


def _state(collection: Collection, view: View) -> dict[str, Any]:
    return {
        "is_globus_connect": True,
        "gcp_connected": view.connected,
        "gcp_paused": view.paused,
        # Shown once, in the answer that created it.
        "globus_connect_setup_key": None,
        "in_use": view.in_use,
        "non_functional": False,
        "non_functional_endpoint_id": None,
        "non_functional_endpoint_display_name": None,
        "last_accessed_time": api_time(collection.last_accessed),
        # Ours: whether the owner's configuration allows writing, and whether the folder is there.
        "read_only": collection.read_only,
        "available": collection.available,
    }


def _policy(collection: Collection, view: View) -> dict[str, Any]:
    allowed = abilities(collection.facts, view.subject)
    policy = collection.notification_policy
    return {
        "public": collection.public,
        # Every connection is encrypted, whatever this says.
        "force_encryption": collection.force_encryption,
        "disable_verify": collection.disable_verify,
        "force_verify": collection.force_verify,
        "disable_anonymous_writes": collection.disable_anonymous_writes,
        "subscription_id": collection.subscription_id,
        "subscription_admin_verified": collection.subscription_admin_verified,
        "shareable": collection.shareable,
        "acl_available": collection.shareable,
        "acl_editable": collection.shareable and Ability.CHANGE_RULES in allowed,
        "my_effective_roles": list(effective_roles(collection.facts, view.subject)),
        "guest_collection_activity_notification_policy": None if policy is None else json.loads(policy),
        "network_use": collection.network_use or "normal",
        "local_user_info_available": True if Ability.READ in allowed else None,
    }


def _hosting(collection: Collection) -> dict[str, Any]:
    return {
        "host_endpoint": None,
        "host_endpoint_id": None,
        "host_endpoint_display_name": None,
        "host_path": None,
        "mapped_collection_id": None,
        "mapped_collection_display_name": None,
        "sharing_target_endpoint": None,
        "sharing_target_root_path": None,
        # Ours: the logical endpoint (one machine's agent) that serves this collection.
        "towpath_endpoint_id": collection.endpoint_id,
    }


_NOT_IN_USE: dict[str, Any] = {
    "https_server": None,
    "tlsftp_server": None,
    "gcs_manager_url": None,
    "gcs_version": None,
    "high_assurance": False,
    "authentication_timeout_mins": None,
    "authentication_policy_id": None,
    "authentication_assurance_timeout": None,
    "mfa_required": False,
    "acl_max_expiration_period_mins": None,
    "max_concurrency": None,
    "preferred_concurrency": None,
    "max_parallelism": None,
    "preferred_parallelism": None,
    "preserve_modtime": None,
    "restrict_transfers_to_high_assurance": None,
    "auto_delete_timeout": None,
    "skip_auto_delete": None,
    "associated_flow_policy": None,
    "requester_pays": False,
    "activated": True,
    "expires_in": -1,
    "expire_time": None,
    "myproxy_server": None,
    "myproxy_dn": None,
    "oauth_server": None,
    "s3_url": None,
    "s3_owner_activated": False,
    "french_english_bilingual": False,
}


def _server(collection: Collection, view: View) -> dict[str, Any]:
    return {
        "DATA_TYPE": "server",
        "id": 0,
        "hostname": None,
        "port": None,
        "scheme": None,
        "uri": None,
        "subject": None,
        "incoming_data_port_start": None,
        "incoming_data_port_end": None,
        "outgoing_data_port_start": None,
        "outgoing_data_port_end": None,
        "is_connected": view.connected,
        "is_paused": view.paused,
        # Ours: which node answers for the collection.
        "node_id": collection.node_id,
    }


def server_list(collection: Collection, view: View) -> dict[str, Any]:
    """``GET /endpoint/<id>/server_list``."""
    return {"DATA_TYPE": "endpoint_server_list", "endpoint": collection.id, "DATA": [_server(collection, view)]}


def only_fields(document: dict[str, Any], wanted: Container[str] | None) -> dict[str, Any]:
    """The document cut to the keys a client asked for; None means all."""
    if wanted is None:
        return document
    return {key: value for key, value in document.items() if key in wanted or key == "DATA_TYPE"}
