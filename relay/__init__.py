"""The control plane: identities, permissions, tasks, rendezvous, and the Globus-compatible APIs."""
