// The API key stays in this tab: it is kept in sessionStorage and travels only as the Authorization
// header of the page's own events, where the server reads it without keeping it.
(() => {
  const plainFetch = window.fetch;
  window.fetch = (input, init = {}) => {
    const key = sessionStorage.getItem("herd-api-key");
    if (key && String(input.url ?? input).includes("/gradio_api/queue/join")) {
      const headers = new Headers(init.headers);
      headers.set("Authorization", "Bearer " + key);
      init = { ...init, headers };
    }
    return plainFetch(input, init);
  };
  window.herdKeepKey = (key) =>
    // A header carries ASCII only.
    sessionStorage.setItem("herd-api-key", key.trim().replace(/[^!-~]/gu, encodeURIComponent));

  // Copying an answer leaves out its byline, which is the message's last part.
  const byline = /\s*<span class="herd-by">[^]*$/;
  const clipboard = navigator.clipboard; // absent where the page is served without TLS to other hosts
  const plainWrite = clipboard?.writeText.bind(clipboard);
  if (plainWrite) clipboard.writeText = (text) => plainWrite(text.replace(byline, ""));
})();
