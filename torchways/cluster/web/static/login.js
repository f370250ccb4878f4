// Logs in with what is behind "#token=" in the address, which browsers do not send to servers.
"use strict";

const given = new URLSearchParams(location.hash.slice(1)).get("token");
if (given) {
  history.replaceState(null, "", location.pathname);
  document.getElementById("token").value = given;
  document.getElementById("login").submit();
}
