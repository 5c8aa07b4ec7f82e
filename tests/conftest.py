"""Fixtures shared by all tests. Ray and S3 fixtures start real servers, once per session."""
