"""Generated code of lp_edge.v1; see :mod:`lp_edge.proto.generate`."""
