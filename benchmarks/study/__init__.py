"""A controlled study of what conditioning on the other response does to what is learned."""
