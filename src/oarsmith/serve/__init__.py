"""A model as a service: HTTP, gRPC and a page, over one engine."""
