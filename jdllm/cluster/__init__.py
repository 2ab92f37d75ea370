"""Work spread over the processes of a Ray cluster; Ray is imported only where it is asked for."""
