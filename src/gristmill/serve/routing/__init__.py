"""Scale-out: worker processes and Ray replicas behind one server, and the choice of who answers."""
