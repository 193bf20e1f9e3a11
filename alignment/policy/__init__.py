"""The model that trains: loading, adapters, identity, export."""
