"""Clients of the gRPC server."""
