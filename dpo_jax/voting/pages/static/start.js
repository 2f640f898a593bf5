// The start page: tells the server who votes, then opens the page to vote on.
"use strict";

// Tells the server that a request that is sent again, after its reply was lost, is from the same person.
const key = [...crypto.getRandomValues(new Uint8Array(16))].join("-");

document.getElementById("start").addEventListener("submit", async (event) => {
  event.preventDefault();
  const message = document.getElementById("message");
  try {
    const response = await fetch("/api/start", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ name: document.getElementById("name").value, key }),
    });
    if (response.ok) location.assign("/");
    else message.textContent = await response.text();
  } catch {
    message.textContent = "The server doesn't answer. Try again.";
  }
});
